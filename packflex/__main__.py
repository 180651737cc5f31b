"""`python -m packflex`: the command line."""

from packflex.cli import main

if __name__ == "__main__":
    main()
