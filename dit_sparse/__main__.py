"""`python -m dit_sparse`: the command line without its script."""

from dit_sparse.cli import main

if __name__ == "__main__":
    main()
