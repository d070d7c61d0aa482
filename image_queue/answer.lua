#!lua flags=allow-oom
-- Publish the answers of a batch and remove the batch from the taken list. If the heartbeat has expired, return 0 and
-- leave the list unchanged: another server may have reclaimed it, so its head may not be this batch.
-- KEYS: taken list, heartbeat, then for each job its result and its accepted marker
-- ARGV: entries of the batch, then for each job its answer and the milliseconds to keep it
for i = 3, #KEYS, 2 do
    redis.call('DEL', KEYS[i], KEYS[i + 1])
    redis.call('RPUSH', KEYS[i], ARGV[i - 1])
    redis.call('PEXPIRE', KEYS[i], ARGV[i])
end
local alive = redis.call('EXISTS', KEYS[2])
if alive == 1 then redis.call('LTRIM', KEYS[1], ARGV[1], -1) end
return alive
