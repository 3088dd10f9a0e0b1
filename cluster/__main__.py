"""`python -m cluster` is `secateur`."""

from cluster.cli import main

if __name__ == "__main__":
    main()
