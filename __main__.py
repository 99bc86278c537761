"""``python -m scq``, the command line; ``accelerate launch --module scq`` starts it in several processes."""

from scq.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
