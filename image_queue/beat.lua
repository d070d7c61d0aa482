#!lua flags=allow-oom
-- Write a heartbeat and the model's shape. With the option XX, return false if the old heartbeat has expired. A script,
-- because a plain SET fails when Redis is out of memory: every heartbeat would expire, and nobody would empty the queue.
-- KEYS: heartbeat, shape (optional)
-- ARGV: value of the shape, its TTL in seconds, value of the heartbeat, options of its SET
local beat = redis.call('SET', KEYS[1], unpack(ARGV, 3))
if beat and KEYS[2] then redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2]) end
return beat
