"""`python -m rmsnorm` is the command `rmsnorm`."""

from rmsnorm.tools.cli import main

if __name__ == "__main__":
    main()
