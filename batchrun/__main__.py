"""`python -m batchrun` is the same as `batchrun`."""

from batchrun.cli import main

if __name__ == "__main__":
    main()
