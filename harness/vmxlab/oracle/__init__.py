"""The oracle: what a case must do, from the SDM, the case and the capability MSRs alone.

    prediction = predict(compile_case(case, target), target)

It never guesses: what it does not know is `Unknown`, what the SDM leaves open is `Undefined`. `Run.check()`
compares what a machine did with it.
"""
