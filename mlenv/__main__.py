"""`python -m mlenv` is `mlenv`."""

from mlenv.cli.main import main

if __name__ == "__main__":
    main()
