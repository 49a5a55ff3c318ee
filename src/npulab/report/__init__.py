"""A Profile for people: as text, as one page of HTML, as a trace for a viewer."""
