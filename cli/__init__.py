"""The commands of scq. With cli.py they sit on top of every room; each imports only what it needs when it runs."""
