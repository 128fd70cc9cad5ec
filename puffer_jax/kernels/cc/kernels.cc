// The LSTM, the MinGRU, convolutions, pooling, perceptrons and random numbers for CPUs, as XLA custom calls.
//
// Nearly all of it is one small matrix product (`tile`): rows of A read in place, where they lie in
// an image, a sequence or a matrix; a panel of B; the sums in registers. What XLA:CPU lacks is the
// choice of where the rows lie: it copies patches, states and transposes through memory.
//
// Work is split by shapes and the number of threads only, so results do not vary between calls.
//
// One translation unit. A user waits for the build, in which the headers (XLA's above all) are read
// once, tiles are compiled once for all operations, and one command is all there is to it: no
// object files and no linking. And what a thread keeps, its helpers and its memory, is shared.

#include "adam.cc"
#include "convolution.cc"
#include "convolution_gradient.cc"
#include "linear.cc"
#include "lstm_backward.cc"
#include "lstm_forward.cc"
#include "lstm_step.cc"
#include "mingru.cc"
#include "perceptron.cc"
#include "pooling.cc"
#include "random.cc"
#include "recurrence.cc"
