#!lua flags=allow-oom
-- Put the last entries of a taken list back at the head of the queue, in their original order.
-- KEYS: queue, taken list
-- ARGV: maximum number of entries
for i = 1, tonumber(ARGV[1]) do
    if not redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'LEFT') then break end
end
