# Fails the build if a kernel object offers an inline function or template instance outside its own namespace: the
# linker keeps one copy of those for the whole library, maybe one for an instruction set that the processor lacks
# (src/dispatch.h). Called with NM, ISA and OBJECTS (separated by "|").
string(REPLACE "|" ";" OBJECTS "${OBJECTS}")
string(LENGTH "${ISA}" length)
foreach(object IN LISTS OBJECTS)
    execute_process(COMMAND ${NM} ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE status)
    if(NOT status EQUAL 0)
        message(FATAL_ERROR "${NM} ${object} failed")
    endif()
    string(REPLACE "\n" ";" symbols "${symbols}")
    foreach(symbol IN LISTS symbols)
        if(symbol MATCHES " [WVu] " AND NOT symbol MATCHES "5qcore3cpu${length}${ISA}" AND NOT symbol MATCHES "DW\\.ref\\.")
            message(FATAL_ERROR "${object} holds a shared inline symbol compiled for ${ISA}: ${symbol}")
        endif()
    endforeach()
endforeach()
