"""``python -m gpuprep``."""

from gpuprep.cli import main

if __name__ == "__main__":
    main()
