-- wrk script of benchmarks/wire.py: posts one file repeatedly.
--
--     wrk ... --script post.lua URL -- FILE CONTENT-TYPE ACCEPT
--
-- The last line of its output contains the number of requests begun, the seconds from the first to the last of them,
-- and the number of failures. Each connection begins a request when the previous one is finished, so that this count is
-- as precise for slow responses as for fast ones, unlike a count of responses per second.

local ffi = require("ffi")
ffi.cdef("typedef struct { long seconds, microseconds; } moment; int gettimeofday(moment *, void *);")
local moment = ffi.new("moment")

begun, first, last = 0, 0, 0

function init(args)
    wrk.method = "POST"
    wrk.body = assert(io.open(args[1], "rb")):read("*a")
    wrk.headers["Content-Type"] = args[2]
    wrk.headers["Accept"] = args[3]
end

-- Called before each request: returns the milliseconds to wait.
function delay()
    ffi.C.gettimeofday(moment, nil)
    last = tonumber(moment.seconds) + tonumber(moment.microseconds) / 1e6
    first = begun == 0 and last or first
    begun = begun + 1
    return 0
end

local only_thread

function setup(thread)
    only_thread = thread
end

function done(summary)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    local seconds = only_thread:get("last") - only_thread:get("first")
    print(string.format("%d %.6f %d", only_thread:get("begun"), seconds, failed))
end
