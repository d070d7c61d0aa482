#!lua flags=allow-oom
-- Empty the taken list of a dead server: publish answers and requeue jobs. If the length of the list has changed, change
-- nothing and return 0: only the first server to reclaim it succeeds.
-- KEYS: queue, taken list, then for each answered job its result and its accepted marker
-- ARGV: length of the taken list, number of jobs for the head of the queue, then for each answered job its answer and
--       the milliseconds to keep it, then the jobs for the head, then the jobs for the end
if redis.call('LLEN', KEYS[2]) ~= tonumber(ARGV[1]) then return 0 end
for i = 3, #KEYS, 2 do
    redis.call('DEL', KEYS[i], KEYS[i + 1])
    redis.call('RPUSH', KEYS[i], ARGV[i])
    redis.call('PEXPIRE', KEYS[i], ARGV[i + 1])
end
local first = #KEYS + 1
local last = first + tonumber(ARGV[2])
for i = last - 1, first, -1 do redis.call('LPUSH', KEYS[1], ARGV[i]) end
for i = last, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('DEL', KEYS[2])
return 1
