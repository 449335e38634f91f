"""``python -m lightning_znorm``."""

from lightning_znorm.cli import main

if __name__ == "__main__":
    main()
