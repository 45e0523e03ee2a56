"""The life of a run: who takes part, what is accepted, when it goes on."""
