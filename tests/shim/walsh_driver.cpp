// Runs the kernels of walsh.cu (WALSH_SOURCE, or a mutated copy of it) on the CPU, as a library or as a program.
#include "cuda_shim.h"

#include WALSH_SOURCE

namespace {

typedef long long Arguments[11];                                     // two addresses, then batch_stride .. tiles

template <typename Kernel>
bool run_if(const char* wanted, const char* name, unsigned grid, unsigned bx, unsigned by, const long long* a,
            Kernel kernel)
{
    if (std::strcmp(wanted, name)) return false;
    shim::launch(grid, bx, by, [&] {
        kernel(reinterpret_cast<const scalar*>(a[0]), reinterpret_cast<scalar*>(a[1]), a[2], a[3], a[4], a[5], a[6],
               a[7], a[8], a[9], a[10]);
    });
    return true;
}

template <int V, int G>
bool run_with(const char* wanted, unsigned grid, unsigned bx, unsigned by, const long long* a)
{
    char project_name[32], expand_name[32], fold_name[32];
    std::snprintf(project_name, sizeof project_name, "project<%d, %d>", V, G);
    std::snprintf(expand_name, sizeof expand_name, "expand<%d, %d>", V, G);
    std::snprintf(fold_name, sizeof fold_name, "fold<%d>", V);
    return run_if(wanted, project_name, grid, bx, by, a, project<V, G>) ||
           run_if(wanted, expand_name, grid, bx, by, a, expand<V, G>) ||
           run_if(wanted, fold_name, grid, bx, by, a, fold<V>);
}

}  // namespace

extern "C" int run(const char* name, unsigned grid, unsigned bx, unsigned by, const long long* a)
{
    constexpr int G = N >= 8 ? 4 : N / 2;
    if (run_with<1, 1>(name, grid, bx, by, a) || run_with<1, G>(name, grid, bx, by, a)) return 0;
#if SCALAR
    if (run_with<2, 1>(name, grid, bx, by, a) || run_with<2, G>(name, grid, bx, by, a)) return 0;
#endif
    return 1;
}

// walsh NAME GRID BX BY INPUT OUTPUT OUTPUT_BYTES batch_stride .. tiles: heap buffers of the exact size, for
// AddressSanitizer. The output starts as NaN, so that what a kernel leaves out is seen.
#ifdef SHIM_PROGRAM
int main(int count, char** argument)
{
    if (count != 17) return 2;
    std::FILE* file = std::fopen(argument[5], "rb");
    std::fseek(file, 0, SEEK_END);
    const size_t in_bytes = std::ftell(file), out_bytes = std::atoll(argument[7]);
    std::rewind(file);
    std::unique_ptr<char[]> in(new char[in_bytes]), out(new char[out_bytes]);
    if (std::fread(in.get(), 1, in_bytes, file) != in_bytes) return 2;
    std::fclose(file);
    std::memset(out.get(), 0xff, out_bytes);
    Arguments a = {reinterpret_cast<long long>(in.get()), reinterpret_cast<long long>(out.get())};
    for (int i = 0; i < 9; ++i) a[2 + i] = std::atoll(argument[8 + i]);
    if (run(argument[1], std::atoi(argument[2]), std::atoi(argument[3]), std::atoi(argument[4]), a)) return 2;
    file = std::fopen(argument[6], "wb");
    std::fwrite(out.get(), 1, out_bytes, file);
    std::fclose(file);
    return 0;
}
#endif
