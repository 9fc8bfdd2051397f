"""`python -m continual` is the `continual` command."""

from continual.cli.main import main

if __name__ == "__main__":
    main()
