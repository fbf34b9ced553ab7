"""The zoo: every architecture of the transformers library, tiny, from its config, explained and checked."""
