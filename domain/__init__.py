"""The vocabulary of the engine: plain values and pure functions, no I/O, no import of another package of this project."""
