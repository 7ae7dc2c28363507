"""The Climber on CPUs with AVX512-BF16, compiled by numba where it runs: no graph, no compiler to install.

`support.why_not` says whether a model suits; `native_climber.NativeClimber` is the engine. The files, lowest first:

    vector_code   16 floats in LLVM's words            layout         where everything lies
    tiles         12 x 32 of a product, in registers   weight_panels  weights into panels, at load
    row_code      norms, softmax, embeddings' sums     scratch        the memory of a call
    layer_code    keys and values into panels          compiled       numba, and what is kept on disk
    products, apart                                    a matrix of tiles; code that is compiled once
    layer_steps, history_attention, candidate_attention, embedding, fusion -> native_calls -> native_climber

One request of C candidates: embed them; for each block and layer: norm, queries, keys and values, attention a head at a
time over the history's keys, packed as they are read, then projection and feed-forward, 132 rows at a time, so that the
hidden layer stays in the second-level cache; then fusion and head.
"""
