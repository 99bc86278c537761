"""The commands of scq. They may import any room, and no room imports them; each imports what it needs at run time."""
