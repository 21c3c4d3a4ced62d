"""`python -m pipeline VERB`."""

import sys

if __name__ == "__main__":
    try:
        from pipeline.cli import main

        main()
    except KeyboardInterrupt:  # before the command line was there to say so
        print("interrupted; run the same command to resume", file=sys.stderr)
        sys.exit(130)
