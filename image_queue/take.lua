#!lua flags=allow-oom
-- Move jobs from the head of the queue to a taken list and return them. Used only when Redis is out of memory.
-- KEYS: queue, taken list
-- ARGV: maximum number of jobs
local jobs = {}
for i = 1, tonumber(ARGV[1]) do
    local job = redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
    if not job then break end
    jobs[i] = job
end
return jobs
