#!lua flags=allow-oom
-- Write a heartbeat and the model's shape. With the option XX, return false if the old heartbeat has expired. Plain SET
-- fails when Redis is out of memory, and then no server would stay alive to empty the queue.
-- KEYS: heartbeat, shape (optional)
-- ARGV: value of the shape and its seconds to live, value of the heartbeat and its options for SET
local beat = redis.call('SET', KEYS[1], unpack(ARGV, 3))
if beat and KEYS[2] then redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2]) end
return beat
