"""What sparse decode costs on any checkpoint: text, needles and chains, decoded by the code of a served step."""
