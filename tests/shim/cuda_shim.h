// Runs a CUDA kernel on the CPU, unchanged: each CUDA thread of a block is a fiber of its own, so a barrier suspends it
// in the middle of the kernel. Blocks run one after another; in a block a thread runs until it meets a barrier or ends.
// Threads go in rising order, or in falling order where the environment says SHIM_REV=1: a kernel that needs a barrier
// and lacks it gives wrong numbers. A barrier that some threads of the block do not reach aborts the process.
// Not covered: PTX, warp intrinsics, dynamic shared memory, races inside a warp, timing.
#pragma once
#include "crt/host_defines.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __shared__ static
#define __syncthreads() shim::barrier(__LINE__)

namespace shim {

struct Index {
    unsigned x, y, z;
};

}  // namespace shim

inline shim::Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index index;
    int line = 0;                                                    // the barrier it waits at
    bool done = false;
};

constexpr size_t STACK = 256 * 1024;
inline ucontext_t scheduler;
inline Fiber* running;
inline const std::function<void()>* kernel;

inline void enter()
{
    (*kernel)();
    running->done = true;
    swapcontext(&running->context, &scheduler);
}

inline void barrier(int line)
{
    running->line = line;
    swapcontext(&running->context, &scheduler);
}

inline void run_block(Fiber* fibers, size_t count, bool reversed)
{
    for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = fibers[i];
        fiber.done = false;
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (size_t live = count; live;) {
        size_t waiting = 0;
        int line = 0;
        bool same = true;
        for (size_t i = 0; i < count; ++i) {
            Fiber& fiber = fibers[reversed ? count - 1 - i : i];
            if (fiber.done) continue;
            running = &fiber;
            threadIdx = fiber.index;
            swapcontext(&scheduler, &fiber.context);
            if (fiber.done) {
                --live;
            } else {
                same = same && (!waiting || line == fiber.line);
                line = fiber.line;
                ++waiting;
            }
        }
        if (waiting && (waiting != count || !same)) {
            std::fprintf(stderr, "shim: __syncthreads at line %d reached by %zu of %zu threads%s\n", line, waiting,
                         count, same ? "" : ", not all of them at this one");
            std::abort();
        }
    }
}

inline void launch(unsigned grid, unsigned block_x, unsigned block_y, const std::function<void()>& body)
{
    const char* order = std::getenv("SHIM_REV");
    const size_t count = block_x * block_y;
    static std::vector<Fiber> fibers;                                // their stacks are kept from launch to launch
    if (fibers.size() < count) fibers.resize(count);
    for (unsigned i = 0; i < count; ++i) fibers[i].index = {i % block_x, i / block_x, 0};
    gridDim = {grid, 1, 1};
    blockDim = {block_x, block_y, 1};
    kernel = &body;
    for (unsigned block = 0; block < grid; ++block) {
        blockIdx = {block, 0, 0};
        run_block(fibers.data(), count, order && *order == '1');
    }
}

}  // namespace shim
