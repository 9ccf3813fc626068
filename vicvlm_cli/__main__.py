"""For launchers that take a module: ``accelerate launch -m vicvlm_cli pretrain``."""

from vicvlm_cli.cli import main

if __name__ == "__main__":
    main()
