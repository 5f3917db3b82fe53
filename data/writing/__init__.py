"""From whatever people have to shards with an index, and a look at what came out."""
