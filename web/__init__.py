"""The parts of the web program, from a client's upload to the queue. Imports no Keras."""
