// Tensor cores through mma.sync (sm_80 and newer) and what feeds them; on the host shim the same in
// C++, except for ldmatrix.
#pragma once
#include "cuda_common.cuh"

#ifdef __CUDA_ARCH__
__device__ inline unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, in the background; zeros unless `inside`.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(inside ? 16 : 0));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int LEFT> __device__ inline void wait_copies() {  // all groups but the last LEFT
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8x8 matrices of 16-bit numbers, lane l giving the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
__device__ inline void load_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

// c (16, 8) += a (16, 16) b (16, 8); lane l holds c's rows l / 4 and l / 4 + 8, columns 2 (l % 4)
// and the next.
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same in int8 with sums in int32: a (16, 32), b (32, 8).
__device__ inline void mma(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#if __CUDA_ARCH__ >= 890
struct e4m3 {};
// The same in e4m3 with sums in fp32, of which tensor cores keep some 13 bits: add up few.
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, e4m3) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
#elif defined(SIMT_HOST)
inline void copy_async(void* to, const void* from, bool inside) {
    simt::block->copies[simt::rank].groups.back().push_back({to, inside ? from : nullptr});
}
inline void commit_copies() { simt::block->copies[simt::rank].groups.emplace_back(); }
template <int LEFT> inline void wait_copies() { simt::finish_copies(LEFT); }

// c += a b; dot(x, y) multiplies the numbers of two registers pair by pair and adds them up.
// Lane l gives a's rows l / 4 (a[0], a[2]) and l / 4 + 8, b's column l / 4; of both the (l % 4)-th
// register of the first half of their inputs, and of the second.
template <class C, class F>
inline void product(C (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, F dot) {
    const int lane = threadIdx.x % 32, row = lane / 4 * 4, column = lane % 4 * 8;
    simt::together(std::array<unsigned, 6>{a[0], a[1], a[2], a[3], b0, b1}, [&](auto of) {
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 4; ++k) {
                const auto left = of(row + k), right = of(column + i % 2 * 4 + k);
                c[i] += dot(left[i / 2], right[4]) + dot(left[i / 2 + 2], right[5]);
            }
    });
}
template <class T>
inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, T) {
    product(c, a, b0, b1, [](unsigned x, unsigned y) {
        T u[2], v[2];
        std::memcpy(u, &x, 4);
        std::memcpy(v, &y, 4);
        return float(u[0]) * float(v[0]) + float(u[1]) * float(v[1]);
    });
}
struct e4m3 {};
inline float from_e4m3(unsigned byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float magnitude = (byte & 127) == 127 ? NAN
                            : exponent ? std::ldexp(float(8 + mantissa), exponent - 10)
                                       : std::ldexp(float(mantissa), -9);
    return byte & 128 ? -magnitude : magnitude;
}
inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, e4m3) {
    product(c, a, b0, b1, [](unsigned x, unsigned y) {
        float sum = 0.f;
        for (int i = 0; i < 32; i += 8) sum += from_e4m3(x >> i & 255) * from_e4m3(y >> i & 255);
        return sum;
    });
}
inline void mma(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    product(c, a, b0, b1, [](unsigned x, unsigned y) {
        int sum = 0;
        for (int i = 0; i < 32; i += 8) sum += (signed char)(x >> i) * (signed char)(y >> i);
        return sum;
    });
}
#endif

__device__ inline unsigned pack(float low, float high, bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ inline unsigned pack(float low, float high, f16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}
