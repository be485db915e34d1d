"""`python -m layalign`, and with it `torchrun --nproc-per-node 8 -m layalign train ...`."""

from layalign.cli import main

if __name__ == "__main__":
    main()
