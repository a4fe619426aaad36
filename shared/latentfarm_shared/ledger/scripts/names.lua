-- Names of embeddings: the truth is in S3, this is its index.
--
-- lf:names           hash    <owner>/<name> -> JSON of the name's record
-- lf:names:number    hash    <owner>/<name> -> number of that record, growing
-- lf:names:changes   stream  names that changed, for workers to follow (capped)
-- lf:pins            hash    <owner>/<name> -> how many unfinished jobs use it
-- lf:used            zset    content ids of embeddings by how many jobs used them
-- lf:embedding:failures  hash  content ids -> images in a row that failed with it;  lf:embedding:worked  set

local function change(name, place, entry)
  redis.call('HSET', 'lf:names', name, entry)
  redis.call('HSET', 'lf:names:number', name, place)
  redis.call('XADD', 'lf:names:changes', 'MAXLEN', '~', 10000, '*', 'name', name)
end

-- put_name(name, number, entry, anew): index a name's record unless a later one is there, or the same, if not anew
local function put_name(_, a)
  local place = tonumber(a[2])
  local known = tonumber(redis.call('HGET', 'lf:names:number', a[1]) or '0')
  if place < known or (place == known and a[4] ~= '1') then return 0 end
  change(a[1], place, a[3])
  return 1
end

-- take_name(name, force): mark a name removed, so that nobody pins it from now on; returns how many unfinished jobs
-- pin it, which without force keep it
local function take_name(_, a)
  local entry = redis.call('HGET', 'lf:names', a[1])
  if not entry then return 0 end
  local pins = tonumber(redis.call('HGET', 'lf:pins', a[1]) or '0')
  if pins > 0 and a[2] ~= '1' then return pins end
  local removed = string.gsub(entry, '"state":"%a+"', '"state":"removed"', 1)
  change(a[1], redis.call('HGET', 'lf:names:number', a[1]), removed)
  return 0
end

-- embeddings_failed(content...): an image failed that used them; returns those that fail the fifth time in a row and
-- never worked
local function embeddings_failed(_, a)
  local suspects = {}
  for _, content in ipairs(a) do
    if redis.call('SISMEMBER', 'lf:embedding:worked', content) == 0
      and redis.call('HINCRBY', 'lf:embedding:failures', content, 1) == 5 then
      suspects[#suspects + 1] = content
    end
  end
  return suspects
end

-- embeddings_worked(content...): a picture was published that used them
local function embeddings_worked(_, a)
  for _, content in ipairs(a) do
    redis.call('SADD', 'lf:embedding:worked', content)
    redis.call('HDEL', 'lf:embedding:failures', content)
  end
  return 1
end
