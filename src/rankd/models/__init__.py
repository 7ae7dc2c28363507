"""The rankers, as torch modules. Training and building import this folder; serving never does."""
