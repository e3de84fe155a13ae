"""Where a merged model goes: each road with the real library, and how far the numbers at its end are from `apply`'s."""
