// Time series: `<div data-chart="hit_tokens,requested_tokens" data-url="/api/history?…">` becomes a uPlot.
