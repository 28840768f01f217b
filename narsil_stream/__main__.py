"""`python -m narsil_stream` is `narsil`."""

from narsil_stream.cli import main

if __name__ == "__main__":
    main()
