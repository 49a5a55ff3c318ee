"""Where the time goes: the Profile of a program, and how spans of work become rows of source operators."""
