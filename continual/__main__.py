"""`python -m continual` is the `continual` command."""

from continual.cli import main

if __name__ == "__main__":
    main()
