// The same pictures in every format that keeps picture files.
#pragma once
#include <catch2/catch.hpp>

#include "mesa/data/packed.h"
#include "support/tar_files.h"

namespace mesa::testing {

/// A folder of JPEG and PNG pictures of three classes below "photos"; `train` and `test` pictures.
DataOptions write_photo_folder(const TemporaryFolder& folder, int train, int test);
/// Both halves as shards of `each` samples with classes.txt, in folders of their own or beside each other.
void write_shards(const TemporaryFolder& folder, const std::string& name, const DatasetPair& data, int64_t each, bool beside);
/// Both halves as a packed file, put together by hand; returns its path.
std::string write_pack(const TemporaryFolder& folder, const DatasetPair& data, const PackOptions& options);
Bytes pack_bytes(const DatasetPair& data, const PackOptions& options);
uint32_t crc32_of(const void* bytes, size_t count);
void check_same_samples(const Dataset& a, const Dataset& b);

}  // namespace mesa::testing
