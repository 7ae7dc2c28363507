"""The gRPC protocols as .proto files, and `descriptors.binpb`, what protoc makes of them."""
