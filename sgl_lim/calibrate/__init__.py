"""Selection layers measured on a model: what a set chosen at one layer covers of the attention of later layers."""
