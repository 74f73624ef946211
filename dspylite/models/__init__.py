"""The models: language models, embedders, and the policies around a call to one."""
