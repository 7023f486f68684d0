"""Runs the command line as ``python -m gpuprep``."""

from gpuprep.cli.app import main

if __name__ == "__main__":
    main()
