"""The parts of the model server: the model, and the loop that takes batches and answers them. Imports no Flask."""
