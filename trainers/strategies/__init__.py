"""How a module's parts live on ranks: whole on each, or in shards. One switch, one contract."""
