"""Run the `hfvit` command with `python -m hfvit`."""

from hfvit.cli import main

if __name__ == "__main__":
    main()
