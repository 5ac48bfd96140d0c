-- wrk's side of benchmarks/wire.py: posts one file again and again.
--
--     wrk ... --script post.lua URL -- FILE CONTENT-TYPE ACCEPT
--
-- The last line that it prints holds the requests begun, the seconds from the first to the last of them, and how many
-- failed. Whoever begins a request has finished the one before: so counted, slow answers are no coarser than quick
-- ones, where answers per whole second would be.

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

-- wrk asks how many milliseconds to wait before each request.
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
