"""The packages of ops/, run as an operator runs them: long, and with programs that not every machine has."""
